"""Measures and checks every case of the registry on the user's own device."""
