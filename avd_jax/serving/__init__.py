"""Pages served over HTTP: prompts to videos, and blind votes. The standard library's server, and files of our own."""
