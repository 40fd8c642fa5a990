"""What a capture leaves behind, and the forms that it takes."""
