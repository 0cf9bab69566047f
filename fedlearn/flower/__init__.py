"""What fedlearn and Flower tell each other."""
