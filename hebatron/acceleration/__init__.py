"""Our operators under a model of transformers, in place: `hebatron.accelerate`."""
