"""Kernels for Hopper (sm_90) in Gluon, which Triton versions change: made for 3.6."""
