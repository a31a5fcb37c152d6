//! What a VMM says about one VM's device on the vhost-user main channel.
//!
//! It never waits: neither for the worker nor for an answer on the back channel, since the VMM is stuck
//! until it has answered.

use std::io;
use std::sync::atomic::Ordering;
use std::sync::{Arc, PoisonError};

use vhost::vhost_user::Backend;
use vhost::vhost_user::message::{VhostUserProtocolFeatures as Protocol, VhostUserShMemConfig};
use vhost_user_backend::VhostUserBackend;
use vm_memory::GuestAddressSpace;
use vmm_sys_util::epoll::EventSet;
use vmm_sys_util::event::{EventConsumer, EventNotifier};
use zerocopy::IntoBytes;

use super::{Device, WAKE};
use crate::config_space;
use crate::hub::lock;
use crate::limits;
use crate::memory::MemoryMap;
use crate::protocol::vq;
use crate::queue::{Memory, Vring};
use crate::throttled;
use crate::vmm::FrontEnd;

impl Device {
    /// Who shows memory in the VM's window.
    pub fn set_front_end(&self, front_end: FrontEnd) {
        self.vmm.set_front_end(front_end);
    }
}

impl VhostUserBackend for Device {
    type Bitmap = ();
    type Vring = Vring;

    fn num_queues(&self) -> usize {
        vq::COUNT
    }

    fn max_queue_size(&self) -> usize {
        limits::MAX_QUEUE_SIZE.into()
    }

    fn features(&self) -> u64 {
        config_space::features(self.options.window > 0)
    }

    fn acked_features(&self, features: u64) {
        self.features.store(features, Ordering::Relaxed);
    }

    fn protocol_features(&self) -> Protocol {
        let always = Protocol::MQ | Protocol::CONFIG | Protocol::REPLY_ACK | Protocol::RESET_DEVICE;
        // Without CONFIGURE_MEM_SLOTS: with it and a live mapping a guest's reset ends QEMU.
        let window = Protocol::BACKEND_REQ | Protocol::BACKEND_SEND_FD | Protocol::SHMEM;
        if self.options.window > 0 { always | window } else { always }
    }

    fn set_event_idx(&self, _enabled: bool) {}

    fn reset_device(&self) {
        self.reset.store(true, Ordering::Release);
        self.hub.wake_vm(self.peer);
    }

    /// Every request asks for an answer, whether the VMM accepted REPLY_ACK or not: without one nobody
    /// knows what it shows.
    fn set_backend_req_fd(&self, backend: Backend) {
        backend.set_reply_ack_flag(true);
        self.set_front_end(Arc::new(backend));
    }

    fn get_shmem_config(&self) -> io::Result<VhostUserShMemConfig> {
        Ok(self.vmm.config())
    }

    /// It waits for no request to the VMM: the VMM waits for it.
    fn stop_vring(&self, _queue: u32) -> io::Result<()> {
        self.vmm.set_ready(false);
        if self.options.revoke_on_stop {
            self.reset_device();
        }
        Ok(())
    }

    /// A VMM may think that the space is larger: what is behind ours is zero.
    fn get_config(&self, offset: u32, size: u32) -> Vec<u8> {
        let config = self.config();
        let bytes = config.as_bytes().iter().copied().chain(std::iter::repeat(0));
        bytes.skip(offset as usize).take(size as usize).collect()
    }

    fn update_memory(&self, memory: Memory) -> io::Result<()> {
        let whole = memory.memory();
        let map = MemoryMap::of_guest(&whole)?;
        if map.has_unsealed() && !self.options.unsealed_ram {
            throttled!(
                self.throttle,
                Warn,
                "{}: its RAM is not sealed against shrinking, or of huge pages, so it is not used: start \
                 the VM with `-object memory-backend-memfd,share=on`, or trust it with the key unsealed-ram",
                self.options.name
            );
        }
        // The framework looks at it for the rings' used index.
        let touchable = map.touchable(&whole, self.options.unsealed_ram);
        for place in [&memory, &self.memory] {
            place.lock().unwrap_or_else(PoisonError::into_inner).replace(touchable.clone());
        }
        *self.map.write().unwrap_or_else(PoisonError::into_inner) = Arc::new(map);
        self.hub.set_memory(self.peer, &whole);
        // While a ring was in no region, its chains could not be seen, nor asked to be announced.
        self.hub.wake_vm(self.peer);
        Ok(())
    }

    fn exit_event(&self, _thread: usize) -> Option<(EventConsumer, EventNotifier)> {
        lock(&self.exit).take()
    }

    /// Never an error: that would end the worker silently.
    fn handle_event(
        &self,
        event: u16,
        _set: EventSet,
        vrings: &[Vring],
        _thread: usize,
    ) -> io::Result<()> {
        if u64::from(event) == WAKE
            && let Some(wake) = self.hub.vm_wake(self.peer)
        {
            wake.consume();
        }
        {
            let mut known = lock(&self.vrings);
            if known.is_empty() {
                *known = vrings.to_vec();
            }
        }
        self.run(vrings);
        Ok(())
    }
}
