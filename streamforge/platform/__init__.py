"""The platform as a whole: which processes it has, how they are started, kept and stopped."""
