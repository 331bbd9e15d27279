"""Read and write weights, fetch from and push to the Hugging Face hub, and export to other formats."""
