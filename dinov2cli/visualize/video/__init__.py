"""Videos in and out: frames, sound, HDR."""
