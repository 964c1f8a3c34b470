"""What comes in: sources, the catalogue of named sets, preprocessing, splits."""
