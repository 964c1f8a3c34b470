"""Import of published weights: layouts of other programs' checkpoints, and their conversion to farout's folders."""
