"""What can be asked of dino2: one frozen class a command, `requests.base` telling how they are made."""
