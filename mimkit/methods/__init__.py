"""Pre-training methods: masked autoencoding and SimMIM."""
