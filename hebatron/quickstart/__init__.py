"""`hebatron quickstart`: real Hebrew text in, a trained and exported Hebatron-shaped model out, offline."""
