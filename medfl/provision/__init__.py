"""Keys, certificates and signed documents that the study lead and the sites exchange, and the app bundle."""
