"""Studies of finished models, sweeps over training runs, the papers' matrix, and plans of resources."""
