"""The messages between server and sites, and how they become Flower records."""
