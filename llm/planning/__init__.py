"""Will a run fit, and how long will it take: asked of the compiler before paying for devices."""
