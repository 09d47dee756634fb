#include "models/spec.h"
