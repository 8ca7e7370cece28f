"""The front doors. A door turns its wire into a JobInput and a Transcript back into its wire."""
