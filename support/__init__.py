"""What the programs stand on. Nothing here imports a program or a model."""
