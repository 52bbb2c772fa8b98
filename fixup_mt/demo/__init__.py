"""The built-in corpus, and a training on it."""
