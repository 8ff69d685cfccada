"""What a site decides and keeps: its settings, what it approved, and the record of what happened. No torch here."""
