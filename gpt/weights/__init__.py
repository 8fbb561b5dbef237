"""The door by which weights come in and go out: whatever file they are in, whichever engine they are for."""
