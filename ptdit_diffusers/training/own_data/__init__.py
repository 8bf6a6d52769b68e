"""Training on one's own pictures: `ptdit inspect`, `ptdit encode`, `ptdit train`, `ptdit average`."""
