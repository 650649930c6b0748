"""From reward model scores to one score: gate, combination, whitening, ranking of K samples, standardization."""
