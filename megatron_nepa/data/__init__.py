"""What images exist, which one sample k of the run is, and how its pixels reach the device."""
