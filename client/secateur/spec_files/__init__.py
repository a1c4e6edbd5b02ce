"""Files of specs: reading and writing them, their JSON Schema, and checking them with a model."""
