"""What is done to fairseq, or around it."""
