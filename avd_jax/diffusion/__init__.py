"""The diffusion maths as pure functions; networks come in as callables."""
