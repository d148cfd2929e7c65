"""What runs at the coordinator: leads the rounds, adds up updates, keeps the state of the run."""
