"""One file a family of diffusion models; they import diffusers, which is slow."""
