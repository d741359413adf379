"""The calibration pass: routing, Gram and neuron statistics, their files, and rankings."""
