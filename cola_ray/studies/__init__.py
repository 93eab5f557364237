"""What models are like and what runs add up to: evaluations, sweeps, the papers' matrix."""
