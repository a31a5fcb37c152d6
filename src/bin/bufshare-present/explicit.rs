//! Explicit synchronisation (linux-drm-syncobj-v1): each commit names two points of the kernel's timelines, one that the
//! compositor waits for and one that it reaches when it is done with the buffer.
//!
//! It knows the protocol, not who signals what.

use std::io;
use std::os::fd::AsFd;

use bufshare::host::syncobj::Timeline;
use wayland_client::delegate_noop;
use wayland_protocols::wp::linux_drm_syncobj::v1::client::{
    wp_linux_drm_syncobj_surface_v1::WpLinuxDrmSyncobjSurfaceV1 as Surface,
    wp_linux_drm_syncobj_timeline_v1::WpLinuxDrmSyncobjTimelineV1 as Imported,
};

use crate::display::{Display, Window};

/// A window whose commits all name points.
pub struct Explicit(Surface);

impl Explicit {
    /// `None` where the compositor does not know this.
    pub fn of(display: &Display, window: &Window) -> Option<Explicit> {
        let manager = display.explicit.as_ref()?;
        Some(Explicit(manager.get_surface(&window.surface, &display.queue, ())))
    }

    /// For the next commit: waits for this point of one, reaches it in the other.
    pub fn set(&self, lines: &Lines, point: u64) {
        let (high, low) = ((point >> 32) as u32, point as u32);
        self.0.set_acquire_point(&lines.acquire, high, low);
        self.0.set_release_point(&lines.release, high, low);
    }

    /// Later commits name none.
    pub fn end(self) {
        self.0.destroy();
    }
}

/// Two timelines, as the compositor knows them.
pub struct Lines {
    acquire: Imported,
    release: Imported,
}

impl Lines {
    /// `None` where the compositor does not know timelines.
    pub fn import(
        display: &Display,
        acquire: &Timeline,
        release: &Timeline,
    ) -> io::Result<Option<Lines>> {
        let Some(manager) = &display.explicit else { return Ok(None) };
        let import = |line: &Timeline| {
            let fd = line.share()?;
            Ok::<_, io::Error>(manager.import_timeline(fd.as_fd(), &display.queue, ()))
        };
        Ok(Some(Lines { acquire: import(acquire)?, release: import(release)? }))
    }
}

impl Drop for Lines {
    fn drop(&mut self) {
        self.acquire.destroy();
        self.release.destroy();
    }
}

delegate_noop!(Display: Surface);
delegate_noop!(Display: Imported);
