"""What several rooms do, once."""
