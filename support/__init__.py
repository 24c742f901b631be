"""What the programs stand on. Nothing here imports a program; checkpoint.py imports models by name.
"""
