"""Writers and pages for TensorBoard."""
