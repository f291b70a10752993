"""What every part may use. Nothing here imports another part of the package."""
