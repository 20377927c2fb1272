"""What the scripts share. Nothing here imports the model, a script or its settings."""
