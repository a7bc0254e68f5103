"""Small, repeatable experiments on the questions of the SimMIM and Swin V2 papers."""
