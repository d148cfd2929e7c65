"""After the last round: is the model sound, does a trigger work on it, and what takes the trigger away."""
