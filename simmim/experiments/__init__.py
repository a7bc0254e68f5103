"""Experiments that a user can repeat: each answers one question of the papers in small."""
