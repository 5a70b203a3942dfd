"""Images and latents: sources, preparation, shards, and the stateless order in which training reads them."""
