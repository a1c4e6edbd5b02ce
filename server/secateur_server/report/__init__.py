"""What is measured on what is sent back."""
