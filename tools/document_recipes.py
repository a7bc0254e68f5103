"""Write recipes/README.md, the reference of all recipe keys, from the schema: ``python tools/document_recipes.py``."""

from pathlib import Path

from simmim.config.reference import document

if __name__ == "__main__":
    Path(__file__).parents[1].joinpath("recipes/README.md").write_text(document(), encoding="utf-8")
