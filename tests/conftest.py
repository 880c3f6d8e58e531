import hypothesis

# Examples are as slow as the machine is busy; tests do not measure time.
hypothesis.settings.register_profile("no_deadline", deadline=None)
hypothesis.settings.load_profile("no_deadline")
