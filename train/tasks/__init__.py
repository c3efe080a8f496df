"""What the trainer trains, one module a method."""
