"""What is looked at before anything starts: settings beside each other, the machine, files, the hub."""
