"""What an attacker finds of single patients in a run: measured, beside what is promised."""
