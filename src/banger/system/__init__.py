"""banger as a part of the system: two units of systemd's, installed and removed by root."""
