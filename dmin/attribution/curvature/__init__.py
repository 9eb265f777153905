"""Curvature of the loss: damped second moments, Hessian products, Kronecker factors."""
