"""How a matrix, or a whole step, is computed: one file a backend."""
