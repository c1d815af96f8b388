"""Evaluation of frozen features: k-NN, logistic regression and linear probe, to the published protocols."""
