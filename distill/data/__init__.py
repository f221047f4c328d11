"""Training data: what a stage names, opened, ordered, put into batches; what is broken set aside."""
